"""Where it is computed: the layout of processes, collectives, and the engines that run a step."""
