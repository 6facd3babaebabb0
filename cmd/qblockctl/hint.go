package main

import (
	"errors"
	"fmt"
	"strings"
)

// usageError: the words after a command of ours make no sense. It is an errUsage.
type usageError struct{ command, what string }

// usage names the command, whose help tells what would make sense.
func usage(command, format string, args ...any) error {
	return &usageError{command, fmt.Sprintf(format, args...)}
}

func (e *usageError) Error() string {
	return fmt.Sprintf("%s: %s; see 'qblockctl help %s'", e.command, e.what, e.command)
}

// Is lets errors.Is take it for what it is.
func (e *usageError) Is(target error) bool { return target == errUsage }

// hints are what to do about refusals that do not say it themselves, as their texts are those of
// QEMU: each for those that have begin at their beginning and with anywhere.
var hints = []struct{ begin, with, do string }{
	{"Cannot find device=", "", "'qblockctl graph' shows the nodes that there are"},
	{"Failed to find node with node-name=", "", "'qblockctl graph' shows the nodes that there are"},
	{"Job not found", "", "'qblockctl jobs' shows the jobs that there are"},
	{"Invalid job ID ''", "", "job-id=NAME gives the job a name"},
	{"Parameter '", " is missing", "'qblockctl help' COMMAND tells which arguments there are"},
	{"Parameter '", " is unexpected", "'qblockctl help' COMMAND tells which arguments there are"},
	{"Parameter '", " expects uint64", "a size is a number of bytes, without a suffix"},
	{"Invalid parameter type for '", "expected: integer", "a size is a number of bytes, without a suffix"},
	{"Parameter 'encrypt.key-secret' is required", "",
		"of a FILE: --password-file; of a node: 'qblockctl object-add qom-type=secret id=NAME file=FILE', then encrypt.key-secret=NAME"},
	{"Parameter 'key-secret' is required", "",
		"of a FILE: --password-file; of a node: 'qblockctl object-add qom-type=secret id=NAME file=FILE', then key-secret=NAME"},
	{"No secret with id", "", "'qblockctl object-add qom-type=secret id=NAME file=FILE' makes a secret"},
	{"TLS negotiation required", "",
		"tls-creds=NAME names the credentials: 'qblockctl object-add qom-type=tls-creds-x509 id=NAME endpoint=client dir=FOLDER'"},
	{"Expected TLS credentials for a client", "", "those that connect need an object with endpoint=client"},
	{"Expected TLS credentials for a server", "", "those that are connected to need an object with endpoint=server"},
	{"NBD server not running", "", "'qblockctl nbd-server-start addr.type=unix addr.data.path=PATH' starts it"},
	{"x-blockdev-amend doesn't support changing the block driver", "", "options of qcow2 are those of nodes with that driver"},
	{"", `Failed to get "`, "the image is in use, by another process or another node; of a running daemon: --node NAME"},
	{"", `Failed to get shared "`, "the image is in use, by another process or another node; of a running daemon: --node NAME"},
}

// hint says what to do about a refusal, where that is known; "" otherwise.
func hint(err error) string {
	var r *replyError
	if !errors.As(err, &r) {
		return ""
	}
	if r.Class == "CommandNotFound" {
		return "'qblockctl query-commands' lists the commands of this daemon"
	}
	if rest, ok := strings.CutPrefix(r.Desc, "Invalid parameter type for '"); ok && strings.HasSuffix(rest, "expected: string") {
		key, _, _ := strings.Cut(rest, "'")
		return fmt.Sprintf(`a string that looks like another JSON value is quoted: '%s="12"'`, key)
	}
	for _, h := range hints {
		if strings.HasPrefix(r.Desc, h.begin) && strings.Contains(r.Desc, h.with) {
			return h.do
		}
	}
	return ""
}
