"""What can go wrong: races (no order at all), every order that is possible, and faults put in on purpose."""
