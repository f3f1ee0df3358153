"""What the service does when it is asked, by kind of verb."""
