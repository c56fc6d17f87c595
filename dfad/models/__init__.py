"""Networks for teachers, students and the generator."""
