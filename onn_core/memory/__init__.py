"""What fits a budget: the plan, the footprint of a layer, boundary activations."""
