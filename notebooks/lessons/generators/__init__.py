"""Steps to quality of generative and structured models: flows, detection, supernets."""
