"""What a training will need, by arithmetic: needs of graphs, peaks of a process, the plan for a budget."""
