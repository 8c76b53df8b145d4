package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/baton-nfs/baton/internal/config"
	"github.com/baton-nfs/baton/internal/status"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// manCmd is for those who make packages.
func (a *app) manCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write the manual pages",
		Long:   "Write the manual pages of all commands, and baton.toml(5), into DIR.",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			date := a.now().UTC()
			if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
				var sec int64
				if _, err := fmt.Sscanf(s, "%d", &sec); err != nil {
					return fmt.Errorf("SOURCE_DATE_EPOCH=%q: %w", s, err)
				}
				date = time.Unix(sec, 0).UTC()
			}
			for name, page := range manPages(cmd.Root(), date) {
				if err := os.WriteFile(filepath.Join(args[0], name), page, 0o644); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// manPages returns the pages by file name.
func manPages(root *cobra.Command, date time.Time) map[string][]byte {
	pages := map[string][]byte{"baton.toml.5": manConfig(date)}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		pages[manName(c)+".1"] = manCommand(c, date)
		for _, sub := range manChildren(c) {
			walk(sub)
		}
	}
	walk(root)
	return pages
}

func manChildren(c *cobra.Command) (l []*cobra.Command) {
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" {
			l = append(l, sub)
		}
	}
	return l
}

func manName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// page is roff in the making, see groff_man(7).
type page struct{ bytes.Buffer }

func newPage(title string, section int, date time.Time) *page {
	p := &page{}
	fmt.Fprintf(p, ".TH %s %d %s \"baton %s\" \"baton manual\"\n", roff(strings.ToUpper(title)), section, date.Format(time.DateOnly), roff(status.Version))
	// Neither hyphens nor wide gaps: most words are names.
	p.WriteString(".nh\n.ad l\n")
	return p
}

// roff escapes what has a meaning in text.
func roff(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", "\\(ga", "^", `\(ha`, "~", `\(ti`).Replace(s)
}

// lines writes text without filling it.
func (p *page) lines(text string) {
	p.WriteString(".nf\n")
	for l := range strings.Lines(text) {
		p.WriteString(`\&` + roff(strings.TrimSuffix(l, "\n")) + "\n")
	}
	p.WriteString(".fi\n")
}

// paragraphs writes text that is cut by empty lines; a paragraph that has indented
// lines keeps its lines.
func (p *page) paragraphs(text string) {
	for i, par := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if i > 0 {
			p.WriteString(".PP\n")
		}
		if strings.Contains("\n"+par, "\n ") {
			p.lines(par)
			continue
		}
		for l := range strings.Lines(par) {
			p.WriteString(`\&` + roff(strings.TrimSuffix(l, "\n")) + "\n")
		}
	}
}

func manCommand(c *cobra.Command, date time.Time) []byte {
	p := newPage(manName(c), 1, date)
	fmt.Fprintf(p, ".SH NAME\n%s \\- %s\n.SH SYNOPSIS\n.B %s\n", roff(manName(c)), roff(c.Short), roff(c.UseLine()))
	text := c.Long
	if text == "" {
		text = c.Short + "."
	}
	p.WriteString(".SH DESCRIPTION\n")
	p.paragraphs(text)
	if subs := manChildren(c); len(subs) > 0 {
		p.WriteString(".SH COMMANDS\n")
		for _, sub := range subs {
			fmt.Fprintf(p, ".TP\n.BR %s (1)\n%s\n", roff(manName(sub)), roff(sub.Short))
		}
	}
	c.InitDefaultHelpFlag()
	if c.Flags().HasAvailableFlags() {
		p.WriteString(".SH OPTIONS\n")
		c.Flags().VisitAll(p.flag)
	}
	if c.Example != "" {
		p.WriteString(".SH EXAMPLES\n")
		p.lines(c.Example)
	}
	p.WriteString(".SH EXIT STATUS\n0: success; 1: failure; 2: wrong usage.\n.SH SEE ALSO\n")
	if c.HasParent() {
		fmt.Fprintf(p, ".BR %s (1),\n", roff(manName(c.Parent())))
	}
	p.WriteString(".BR baton.toml (5)\n")
	return p.Bytes()
}

func (p *page) flag(f *pflag.Flag) {
	if f.Hidden || f.Deprecated != "" {
		return
	}
	name, usage := pflag.UnquoteUsage(f)
	p.WriteString(".TP\n.B ")
	if f.Shorthand != "" {
		p.WriteString(roff("-"+f.Shorthand) + ", ")
	}
	p.WriteString(roff("--"+f.Name) + "\n")
	if name != "" {
		p.Truncate(p.Len() - 1)
		fmt.Fprintf(p, " \\fI%s\\fR\n", roff(name))
	}
	p.WriteString(`\&` + roff(usage) + "\n")
}

// manConfig is the reference of all keys.
func manConfig(date time.Time) []byte {
	p := newPage("baton.toml", 5, date)
	p.WriteString(".SH NAME\nbaton.toml \\- configuration of the baton NFS server\n.SH DESCRIPTION\n")
	p.paragraphs(`The file is in TOML. A key that is not there has its default; a key that does not
exist, or a value out of range, is refused with its line. "baton config --check FILE"
does only that, and "baton config --print-default" prints a file with every key.

Sizes are bytes, or strings with KiB, MiB, GiB or TiB. Times are strings like "100ms",
"10s" or "5m". Changes need a restart; only the exports are read again by a reload.`)
	section := ""
	p.WriteString(".SH TOP LEVEL\n")
	for _, k := range config.Keys() {
		sec, name := config.SplitKey(k.Name)
		if sec != section {
			section = sec
			title := "[" + sec + "]"
			if config.IsArray(sec) {
				title = "[[" + sec + "]]"
			}
			fmt.Fprintf(p, ".SH %s\n", roff(title))
			p.paragraphs(config.SectionDoc(sec))
		}
		value := k.Default
		if value == "" {
			value = k.Example
		}
		fmt.Fprintf(p, ".TP\n\\fB%s\\fR = %s\n", roff(name), roff(value))
		p.paragraphs(k.Doc)
	}
	p.WriteString(".SH FILES\n.TP\n.I " + roff(config.DefaultPath) + "\nis read when no flag names another file.\n.SH SEE ALSO\n.BR baton (1),\n.BR baton\\-serve (1),\n.BR exports (5)\n")
	return p.Bytes()
}
