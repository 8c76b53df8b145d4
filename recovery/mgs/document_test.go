package mgs

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

// Only the document of the registry that is known passes, and what is wrong is said. A
// missing or foreign one may be put right; a damaged one is no matter of waiting.
func TestExpect(t *testing.T) {
	dir := t.TempDir()
	r, err := Open(dir, FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	id, err := r.Identity(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	doc, err := ReadFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	other := strings.Repeat("ab", 16)
	place := filepath.Join(dir, FileName)
	if err := Expect(place, doc, id); err != nil {
		t.Error(err)
	}
	for _, x := range []struct {
		doc  []byte
		id   string
		says []string
		wait bool
	}{
		{nil, id, []string{place, "is empty", id, "baton registry import"}, true},
		{doc, other, []string{place, id, other, "--force"}, true},
		{[]byte("{"), id, []string{"damaged"}, false},
	} {
		err := Expect(place, x.doc, x.id)
		if err == nil || errors.Is(err, ErrUnavailable) != x.wait {
			t.Fatalf("%s: %v", x.doc, err)
		}
		for _, s := range x.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%q is not in %v", s, err)
			}
		}
	}
}
