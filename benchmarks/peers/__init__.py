"""Other simulators on the same workloads, each written the way its own tutorial would."""
