"""Reports on a policy's codes: measures, pictures and a page."""
