"""The best weights of a run, the state that it resumes from, and the thread that writes both."""
