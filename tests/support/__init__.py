"""What several test modules share: random problems, the independent truth, the accuracy rule, the backends to judge."""
