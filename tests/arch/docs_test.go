package arch

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"qblockd/schema"
	"qblockd/schema/types"
)

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var (
	// quoted is a word in backticks; link a file that a link leads to.
	quoted = regexp.MustCompile("`([^` ]+)`")
	link   = regexp.MustCompile(`\]\(([^)#:]+)\)`)
	// file is what looks like one of our files or folders.
	file = regexp.MustCompile(`^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*(\.go|\.md|\.txt|\.sh|\.json|\.tsv|/)$`)
)

// TestNamedFiles: each file that a document names is there.
func TestNamedFiles(t *testing.T) {
	docs, err := filepath.Glob(filepath.Join(root, "docs/*.md"))
	if err != nil || len(docs) == 0 {
		t.Fatal(docs, err)
	}
	for _, doc := range append(docs, filepath.Join(root, "README.md")) {
		b, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(doc), m[1])); err != nil {
				t.Errorf("%s links to %s, which is not there", doc, m[1])
			}
		}
		for _, m := range quoted.FindAllStringSubmatch(string(b), -1) {
			if !file.MatchString(m[1]) {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
				t.Errorf("%s names %s, which is not there", doc, m[1])
			}
		}
	}
}

// TestPackagesAreDescribed: docs/architecture.md knows every package, by name or as part of
// "`PARENT/...`".
func TestPackagesAreDescribed(t *testing.T) {
	text := read(t, "docs/architecture.md")
	for _, p := range list(t, "./...") {
		if !strings.Contains(text, "`"+p.name()+"`") && !strings.Contains(text, "`"+path.Dir(p.name())+"/...`") {
			t.Errorf("docs/architecture.md does not say what `%s` is for", p.name())
		}
	}
}

func strs[T ~string](l []T) (out []string) {
	for _, s := range l {
		out = append(out, string(s))
	}
	return out
}

// TestReadmeTables: what README.md says works is what the schema has, no more and no less.
func TestReadmeTables(t *testing.T) {
	text := read(t, "README.md")
	for title, have := range map[string][]string{
		"Commands": schema.Commands(),
		"Drivers":  strs(types.BlockdevDriverValues),
		"Exports":  strs(types.BlockExportTypeValues),
		"Objects":  strs(types.ObjectTypeValues),
		"Jobs":     strs(types.JobTypeValues),
	} {
		_, section, ok := strings.Cut(text, "### "+title+"\n")
		if !ok {
			t.Errorf("README.md has no table %s", title)
			continue
		}
		section, _, _ = strings.Cut(section, "\n#")
		var works []string
		for row := range strings.Lines(section) {
			cells := strings.SplitN(row, "|", 3)
			if len(cells) < 3 {
				continue
			}
			for _, m := range quoted.FindAllStringSubmatch(cells[2], -1) {
				if strings.TrimSpace(cells[1]) != "not yet" {
					works = append(works, m[1])
				} else if slices.Contains(have, m[1]) {
					t.Errorf("README.md, %s: %s is there, but listed under 'not yet'", title, m[1])
				}
			}
		}
		for _, name := range have {
			if !slices.Contains(works, name) {
				t.Errorf("README.md, %s: %s is missing", title, name)
			}
		}
		for _, name := range works {
			if !slices.Contains(have, name) {
				t.Errorf("README.md, %s: there is no %s", title, name)
			}
		}
	}
}

// TestReadmeConversation pastes the README's conversation into a shell beside "make run".
func TestReadmeConversation(t *testing.T) {
	dir := built(t, "sh", "qemu-io", "qemu-img", "socat")
	var log strings.Builder
	daemon := exec.Command("bin/qblockd", "--quickstart", "run")
	daemon.Dir, daemon.Stderr = dir, &log
	out, err := daemon.StdoutPipe()
	if err == nil {
		err = daemon.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	kill := time.AfterFunc(time.Minute, func() { daemon.Process.Kill() })
	defer kill.Stop()
	defer func() {
		daemon.Process.Kill() // does nothing when the conversation has ended it
		daemon.Wait()
	}()
	// It prints what to try when it is up.
	if n, err := out.Read(make([]byte, 4096)); n == 0 {
		t.Fatalf("make run would print nothing: %v\n%s", err, log.String())
	}
	if err := play(t, dir, read(t, "README.md")); err != nil {
		t.Fatalf("%v\ndaemon:\n%s", err, log.String())
	}
}

// TestGuide pastes the guide into a shell, with ports that are free.
func TestGuide(t *testing.T) {
	dir := built(t, "sh", "qemu-io", "openssl")
	text := read(t, "docs/guide.md")
	for _, port := range []string{"10810", "10811"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, free, _ := net.SplitHostPort(l.Addr().String())
		text = strings.ReplaceAll(text, port, free)
		l.Close()
	}
	// Passwords are made slow to guess, which is slow to make.
	text = strings.ReplaceAll(text, "options.encrypt.format=luks", "options.encrypt.format=luks options.encrypt.iter-time=10")
	err := play(t, dir, text)
	for _, sock := range []string{"run/there.sock", "run/qmp.sock"} {
		quit := exec.Command("bin/qblockctl", "-s", sock, "quit") // fails where the guide has ended the daemon
		quit.Dir = dir
		_ = quit.Run()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// built makes a folder with bin/qblockd and bin/qblockctl, unless one of the tools is missing.
func built(t *testing.T, tools ...string) string {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: the conversation needs %s, which is not installed", tool)
		}
	}
	dir := t.TempDir()
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "bin")+"/", "./cmd/qblockd", "./cmd/qblockctl")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

// play carries out the conversation of a document in a folder, up to the first difference.
func play(t *testing.T, dir, text string) error {
	t.Helper()
	for _, step := range conversation(text) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		sh := exec.CommandContext(ctx, "sh", "-c", step.command)
		sh.Dir, sh.WaitDelay = dir, 10*time.Second
		b, err := sh.CombinedOutput()
		cancel()
		printed := string(b)
		if err != nil {
			printed += err.Error() + "\n"
		}
		if !step.prints.MatchString(printed) {
			return fmt.Errorf("$ %s\nprints\n%s", step.command, printed)
		}
	}
	return nil
}

type step struct {
	command string
	prints  *regexp.Regexp
}

// conversation takes the console blocks of a document apart: "$ COMMAND", then what it prints, with
// "..." for any lines.
func conversation(text string) (steps []step) {
	_, text, _ = strings.Cut(text, "<!-- conversation")
	for _, block := range strings.Split(text, "```console\n")[1:] {
		block, _, _ = strings.Cut(block, "```")
		for _, s := range strings.Split("\n"+block, "\n$ ")[1:] {
			command, prints, _ := strings.Cut(strings.TrimSuffix(s, "\n")+"\n", "\n")
			re := strings.ReplaceAll(regexp.QuoteMeta(prints), `\.\.\.`+"\n", "(?s:.*)")
			steps = append(steps, step{command, regexp.MustCompile(`\A` + strings.ReplaceAll(re, "\n", "\r?\n") + `\z`)})
		}
	}
	return steps
}
