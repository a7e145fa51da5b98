"""What can be said of clusters without one: schedules, placement, goodput, budgets."""
