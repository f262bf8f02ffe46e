"""What verl lacks and any recipe could use; never imports from recipe/."""
