"""The layers of the network and what goes on inside them, in plain torch."""
