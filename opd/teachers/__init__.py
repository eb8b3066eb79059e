"""Teachers: in this process or on a server, and the pair of student and teacher."""
