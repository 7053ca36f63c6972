-- A model of MUSICA's submit plugin, which slurmctld runs for each job (JobSubmitPlugins=lua; slurm.conf(5)).
-- The plugin chooses a mode from WHICH layout options a job gives, and refuses a job that fits none. A form of which no
-- user of MUSICA has written that it runs is refused here. docs/simulated-site.md has the table of the modes.

local TASKS_PER_CPU_NODE, TASKS_PER_GPU_NODE = 190, 4
local GPUS_PER_NODE, MEGABYTES_PER_GPU = 4, 192000
local REFUSED = 2014 -- ESLURM_REQUESTED_NODE_CONFIG_UNAVAILABLE: "Requested node configuration is not available"
local NO_VAL16, NO_VAL = 0xfffe, 0xfffffffe -- what a field has whose option was not given
local MEMORY_PER_CPU = 2 ^ 63 -- flag in `pn_min_memory`; NO_VAL64 has it, too

local function given(value)
    return value ~= nil and value ~= 0 and value ~= NO_VAL16 and value ~= NO_VAL
end

-- Whether a line `#ASC --vanilla` stands before the script's first command.
local function is_vanilla(script)
    for line in string.gmatch(script or "", "[^\n]+") do
        if line == "#ASC --vanilla" then return true end
        if string.find(line, "^%s*[^#%s]") then return false end
    end
    return false
end

-- GPUs per node. `--gres=gpu:h100:4` arrives as `gres:gpu:h100:4`, in newer versions of Slurm as `gres/gpu:h100:4`.
local function gpus_per_node(job)
    local text = job.tres_per_node or ""
    return tonumber(string.match(text, "^gres[:/]gpu:(%d+)$") or string.match(text, "^gres[:/]gpu:%w+:(%d+)$"))
end

local function take_whole_nodes(job, tasks_per_node)
    job.ntasks_per_node = tasks_per_node
    job.threads_per_core = 1
    job.shared = 0
end

local function on_cpu_nodes(job)
    local tasks = given(job.num_tasks)
    if given(job.cpus_per_task) or given(job.ntasks_per_node) or given(job.ntasks_per_socket) then return REFUSED end
    if given(job.min_nodes) and not tasks then
        slurm.log_user("applying job settings for >> full cpu node(s) <<")
        slurm.log_user("setting --ntasks-per-node=%d", TASKS_PER_CPU_NODE)
        job.cpus_per_task = 1
        take_whole_nodes(job, TASKS_PER_CPU_NODE)
        return slurm.SUCCESS
    end
    local shared = not given(job.min_nodes) and tasks and job.pn_min_memory < MEMORY_PER_CPU
    return shared and slurm.SUCCESS or REFUSED
end

local function on_gpu_nodes(job)
    local gpus = gpus_per_node(job)
    local nodes, tasks, tasks_per_node = given(job.min_nodes), given(job.num_tasks), given(job.ntasks_per_node)
    if nodes and gpus == GPUS_PER_NODE and not given(job.cpus_per_task) then
        if tasks_per_node and job.ntasks_per_node ~= TASKS_PER_GPU_NODE then return REFUSED end
        if tasks and not tasks_per_node and job.num_tasks ~= 1 then return REFUSED end
        slurm.log_user("applying job settings for >> full gpu node(s) <<")
        take_whole_nodes(job, tasks and not tasks_per_node and 1 or TASKS_PER_GPU_NODE)
        return slurm.SUCCESS
    end
    if not nodes and gpus and gpus < GPUS_PER_NODE and not tasks and not tasks_per_node then
        if job.pn_min_memory >= MEMORY_PER_CPU then job.pn_min_memory = gpus * MEGABYTES_PER_GPU end
        return slurm.SUCCESS
    end
    return REFUSED
end

function slurm_job_submit(job, partitions, uid)
    if uid == 0 or is_vanilla(job.script) then return slurm.SUCCESS end
    if job.partition == "zen4_0768" then return on_cpu_nodes(job) end
    if job.partition == "zen4_0768_h100x4" then return on_gpu_nodes(job) end
    return slurm.SUCCESS -- Slurm itself refuses any other partition
end

function slurm_job_modify(job, record, partitions, uid)
    return slurm.SUCCESS
end
