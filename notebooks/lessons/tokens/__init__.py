"""What a token of data buys: densities, mixtures, filters, sampling."""
