// A stand-in for the trainer where a test is about the operator: the job's name says how the pod is to end.
// As preflight, it passes, unless it is called refuse...
// leak-N...: tells its Secrets in every text of its termination message, and ends with that code; leak-logs: prints them instead, and says nothing.
// exit-N...: with that code and a termination message; oom...: needs more memory than it has; wait...: trains until SIGTERM, then says "checkpointed";
// fill...: the same, after it wrote more than its workspace may hold; deaf...: trains and does not hear SIGTERM; crash...: dies with words on stderr alone.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

type job struct {
	Name string `json:"name"`
}

var reasons = map[int]string{
	0: "Succeeded", 10: "InvalidSpec", 11: "InvalidData", 12: "AccessDenied", 13: "InsufficientCapacity", 14: "ProofFailed",
	15: "QualityGateFailed", 16: "InfrastructureError", 17: "NotPublished", 18: "Checkpointed",
}

func say(message map[string]any) {
	message["version"] = 1
	text, _ := json.Marshal(message)
	os.WriteFile("/dev/termination-log", text, 0o644)
}

func end(code int) {
	message := map[string]any{"stage": "Publishing", "exitCode": code, "reason": reasons[code], "step": 4, "totalSteps": 4}
	if code == 0 {
		message["artifacts"] = []any{map[string]any{"kind": "adapter", "uri": "s3://models/tiny/lora_model", "digest": "sha256:0", "bytes": 1}}
	} else {
		message["message"] = fmt.Sprintf("The stand-in was asked to end with %d.", code)
	}
	say(message)
	os.Exit(code)
}

// What careless code makes of a Secret: environments, addresses, headers, JSON.
func told() []string {
	var lines []string
	files, _ := filepath.Glob("/var/run/finetune/credentials/*/*")
	for _, file := range files {
		value, err := os.ReadFile(file)
		if err != nil {
			continue // the kubelet keeps folders beside the keys
		}
		key, text := filepath.Base(file), string(value)
		quoted, _ := json.Marshal(map[string]string{key: text})
		lines = append(lines, key+"="+text, fmt.Sprintf("{'%s': '%s'}", key, text), fmt.Sprintf("%q", quoted))
		if key == "HF_TOKEN" || key == "AWS_SECRET_ACCESS_KEY" {
			lines = append(lines, "https://me:"+text+"@hub.example.com/x", "me:"+text+"@proxy:3128", "Authorization: Bearer "+text, "It is "+text)
		}
	}
	return lines
}

func leak(code int) {
	lines := told()
	first := lines[0]
	message := map[string]any{
		"stage": "Publishing", "exitCode": code, "reason": first, "message": strings.Join(lines, "; "), "model": first, "dataset": lines[len(lines)-1],
		"qat":       map[string]any{"scheme": first, "coverage": lines[len(lines)-2]},
		"artifacts": []any{map[string]any{"kind": "adapter", "uri": "s3://" + first + "@models", "digest": first}},
	}
	text := message["message"].(string)
	message["message"] = text[:min(len(text), 1024)]
	say(message)
	os.Exit(code)
}

func preflight(kind string) {
	message := map[string]any{"stage": "Preflight", "exitCode": 0, "reason": reasons[0], "message": "Kernels were not checked."}
	if kind == "refuse" {
		message["exitCode"], message["reason"], message["message"] = 12, reasons[12], "The stand-in may not write there."
	}
	say(message)
	os.Exit(message["exitCode"].(int))
}

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	var description job
	if err := json.Unmarshal([]byte(os.Getenv("FINETUNE_JOB")), &description); err != nil {
		end(10)
	}
	kind, rest, _ := strings.Cut(description.Name, "-")
	if len(os.Args) > 1 && os.Args[1] == "preflight" {
		preflight(kind)
	}
	switch kind {
	case "exit":
		code, _ := strconv.Atoi(strings.Split(rest, "-")[0])
		end(code)
	case "leak":
		code, err := strconv.Atoi(strings.Split(rest, "-")[0])
		if err == nil {
			leak(code)
		}
		for _, line := range append(os.Environ(), told()...) {
			fmt.Println(line)
		}
		os.Exit(1)
	case "oom":
		say(map[string]any{"stage": "Training", "step": 2, "totalSteps": 4})
		var kept [][]byte
		for {
			block := make([]byte, 16<<20)
			for index := 0; index < len(block); index += 4096 {
				block[index] = 1
			}
			kept = append(kept, block)
		}
	case "crash":
		fmt.Fprintln(os.Stderr, "loading the model\nfatal: the tokenizer has no end token")
		os.Exit(3)
	case "deaf":
		say(map[string]any{"stage": "Training"})
		for {
			<-stop
		}
	default:
		say(map[string]any{"stage": "Training"})
		if kind == "fill" {
			os.WriteFile("/workspace/model", make([]byte, 32<<20), 0o644)
		}
		<-stop
		end(18)
	}
}
