"""What the teacher reads in the place of the student's prompt."""
