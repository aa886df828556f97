"""The workloads as an ordinary Flower app."""
