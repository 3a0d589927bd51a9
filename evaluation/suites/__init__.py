"""What is measured on which kind of image set."""
