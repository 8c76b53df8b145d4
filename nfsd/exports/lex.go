package exports

// word is a blank-separated word with quotes and escapes still in it.
type word struct {
	pos
	raw string
}

// lexer cuts the text of an exports file into logical lines of words.
type lexer struct {
	file      string
	src       []byte
	off       int
	line, col int
}

// peek returns the next byte; 0 at the end (a NUL in the file is not special: it
// ends up in a word and is refused there).
func (l *lexer) peek(ahead int) byte {
	if l.off+ahead < len(l.src) {
		return l.src[l.off+ahead]
	}
	return 0
}

func (l *lexer) advance() {
	if l.src[l.off] == '\n' {
		l.line++
		l.col = 1
	} else {
		l.col++
	}
	l.off++
}

// continuation tells whether a backslash and a line end come next, and how many
// bytes they are.
func (l *lexer) continuation() int {
	switch {
	case l.peek(0) != '\\':
		return 0
	case l.peek(1) == '\n':
		return 2
	case l.peek(1) == '\r' && l.peek(2) == '\n':
		return 3
	}
	return 0
}

// next returns the words of the next line that has any; nil at the end. After an
// error the line is skipped. A comment ends with its line even after a backslash,
// so that a comment cannot swallow an export.
func (l *lexer) next() ([]word, *Error) {
	var words []word
	for l.off < len(l.src) {
		switch c := l.peek(0); {
		case l.continuation() > 0:
			for range l.continuation() {
				l.advance()
			}
		case c == '\n':
			l.advance()
			if len(words) > 0 {
				return words, nil
			}
		case c == ' ' || c == '\t' || c == '\r':
			l.advance()
		case c == '#':
			for l.off < len(l.src) && l.peek(0) != '\n' {
				l.advance()
			}
		default:
			w, err := l.word()
			if err != nil {
				return nil, err
			}
			words = append(words, w)
		}
	}
	return words, nil
}

// word reads one word. Blanks inside quotes belong to it; a line end inside
// quotes is an error.
func (l *lexer) word() (word, *Error) {
	w := word{pos: pos{l.file, l.line, l.col}}
	start := l.off
	quoted := false
	for l.off < len(l.src) {
		c := l.peek(0)
		if c == '\n' || !quoted && (c == ' ' || c == '\t' || c == '\r' || l.continuation() > 0) {
			break
		}
		if c == '"' {
			quoted = !quoted
		}
		l.advance()
	}
	if quoted {
		return w, w.errorf("quote is not closed")
	}
	w.raw = string(l.src[start:l.off])
	return w, nil
}
