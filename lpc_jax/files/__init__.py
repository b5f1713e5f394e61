"""Files of models and data: where they are, what they hold, and how they are written."""
