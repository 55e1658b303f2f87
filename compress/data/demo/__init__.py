"""The generated data set: metal parts on a conveyor belt, drawn from a seed."""
