"""What handles did, as rows and as text, and what a process tells of them when it ends."""
