"""What people and programs see of the lake: a service and a page. Both only read what is published."""
