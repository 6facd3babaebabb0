package man

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
)

// Sync compares files below dir, by name, with what they have to be, and returns an error that
// names the first that is not; with write set it writes them instead.
func Sync(dir string, files map[string][]byte, write bool) error {
	for name, want := range files {
		path := filepath.Join(dir, name)
		if write {
			if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
				return err
			}
			if err := os.WriteFile(path, want, 0o666); err != nil {
				return err
			}
			continue
		}
		if have, err := os.ReadFile(path); err != nil || !bytes.Equal(have, want) {
			return fmt.Errorf("%s is not what the command's help says: 'make man' writes it anew", path)
		}
	}
	return nil
}
