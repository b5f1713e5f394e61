"""Where files of models and data are, what they hold, and how they are written."""
