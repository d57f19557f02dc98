// A stand-in for the trainer where a test is about the operator: the job's name says how the pod is to end.
// exit-N...: with that code and a termination message; oom...: needs more memory than it has; wait...: trains until SIGTERM, then says "checkpointed";
// fill...: the same, after it wrote more than its workspace may hold; deaf...: trains and does not hear SIGTERM; crash...: dies with words on stderr alone.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
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
