"""Studies and the making of the packaged weights; `samft` never imports from here."""
