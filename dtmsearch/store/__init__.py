"""What is remembered: durable tables of runs, evaluations and plans, and the questions put to them."""
