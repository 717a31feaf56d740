"""What is said: to the client, refused or not, and to the app."""
