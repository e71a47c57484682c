"""Building blocks without knowledge of methods: collectives, randomness, layers, schedules."""
