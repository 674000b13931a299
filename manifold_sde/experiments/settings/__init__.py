"""The settings of the experiments, which import nothing that is slow to import."""
