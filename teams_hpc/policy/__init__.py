"""Policy training: TRPO over the six operations, members, and the choice among them."""
