"""What keeps days of work safe and what people look at; the method itself is in the files above this folder."""
