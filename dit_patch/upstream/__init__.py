"""What other libraries do that dit_patch has to know or to change."""
