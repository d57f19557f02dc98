-- What Argo CD shows of a FineTuneJob: without it, one of a kind that it does not know counts as healthy as soon as it exists.
-- docs/installing.md says how to install it. Argo CD runs it with Lua's basic functions alone.
local status = obj.status or {}
if status.observedGeneration ~= obj.metadata.generation then
  return {status = "Progressing", message = "Waiting for the operator to see it."}
end

local is_true = {}
for _, condition in ipairs(status.conditions or {}) do
  is_true[condition.type] = condition.status == "True"
end

local health = "Progressing"
if is_true.Ready then
  health = "Healthy"
elseif is_true.Stalled then
  health = "Degraded"
elseif status.phase == "Suspended" then
  health = "Suspended"
end
return {status = health, message = status.message}
