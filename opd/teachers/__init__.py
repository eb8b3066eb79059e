"""Teachers in this process or on a server, and the student/teacher pair."""
