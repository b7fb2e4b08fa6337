"""Workers of other machines that measure trials of a search, through the storage of its study."""
