"""What jobs cost: the hours that they have used, and what is left of a project's budget."""
