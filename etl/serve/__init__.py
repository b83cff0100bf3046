"""What `up` keeps alive: flows on their schedules, a worker, the services."""
