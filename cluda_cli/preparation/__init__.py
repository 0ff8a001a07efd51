"""From a publisher's or a user's files to a prepared dataset."""
