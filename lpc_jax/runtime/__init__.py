"""What runs a network: programs over packed pairs, and the loop that reads them."""
