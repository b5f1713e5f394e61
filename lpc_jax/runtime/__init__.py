"""What runs: a policy on a mesh, its compiled programs, its processes, its files."""
