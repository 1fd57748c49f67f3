"""Classical Chinese poems, judged by form, rhyme book and tone pattern."""
