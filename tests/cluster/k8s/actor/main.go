// A stand-in for the trainer where a test is about the operator: the job's name says how the pod is to end.
// exit-N...: with that code and a termination message; oom...: needs more memory than it has; wait...: trains until SIGTERM, then says "checkpointed".
// leak-N...: tells its Secrets in every text of its termination message, and ends with that code; leak-logs: prints them instead, and says nothing.
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

var reasons = map[int]string{0: "Succeeded", 11: "InvalidData", 16: "InfrastructureError", 17: "NotPublished", 18: "Checkpointed"}

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

func main() {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	var description job
	if err := json.Unmarshal([]byte(os.Getenv("FINETUNE_JOB")), &description); err != nil {
		end(10)
	}
	kind, rest, _ := strings.Cut(description.Name, "-")
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
	default:
		say(map[string]any{"stage": "Training"})
		<-stop
		end(18)
	}
}
