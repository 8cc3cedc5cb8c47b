"""The manager under load: simulated workers, the process that serves them, and the queues that it is compared with."""
