"""What `bench` needs and training does not."""
