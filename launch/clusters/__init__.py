"""Clusters: profiles (the YAML files here, or anywhere), the batch script of a job, and what is asked of SLURM."""
