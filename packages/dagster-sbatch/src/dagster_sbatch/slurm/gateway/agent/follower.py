"""Following the tasks of a job: their output, states and ends. A single job is one task, with index 0."""

import heapq
import os
import time
from functools import partial

from .job_record import MESSAGES, MOST_CHUNKS, events_of, pause_after, short_of
from .run_directories import locate
from .shared_queue import SQUEUE_EVERY
from .slurm_commands import COMMAND_PATIENCE, LAG, OVER, UNSEEN, account, indices_in
from .tasks import Tasks

READS_PER_SECOND = 100.0  # of tasks, however many run; each opens four files
SHARE = 20  # pause after a command of Slurm, in times its duration: for many tasks, its answers are long
PAUSE_PER_TASK = 1e-5  # seconds: of many tasks, going through all takes long
REPORT_EVERY = 1.0  # seconds between two reports of how many tasks wait and run


class Task:
    """A task that has started, or has ended without a start: its streams from an offset on, and its own record.

    began   when it last started
    idle    its own record of idle GPUs
    own     its own record of its end
    heard   when its records were first seen, by this machine's clock: that of its node may be ahead or behind
    due     when it is read again; None if it is not
    empty   when it was last read and had nothing new
    """

    def __init__(self, tasks, index, offsets, heard):
        self.folder, self.streams, self.heard = tasks.path(index), tasks.streams(index, offsets), heard
        self.moved, self.empty = time.time(), 0.0
        self.began = self.idle = self.own = self.events = self.due = None

    def read(self, say):
        """Send what is new; return the number of chunks that the stream with the most had."""
        now, events = time.time(), events_of(self.folder)  # before the streams: all written before the end is sent
        if events != self.events:
            self.heard = self.heard if self.events is None else time.time()
            self.events = events
        start = events.get("started")
        if start and start["time"] != self.began:
            self.began = start["time"]
            say(began=start["time"], node=start["started"], temporary=start.get("temporary", ""))
        if events.get("idle") != self.idle:
            self.idle = events.get("idle")
            if self.idle:
                say(idle=self.idle["idle"])
        sent = max([stream.pump(say) for stream in self.streams])
        if sent:
            self.moved = now
        else:
            self.empty = now
        self.own = events.get("end")
        return sent

    def short(self):
        return short_of(self.streams, (self.own or {}).get("sizes", {}))


class Follower:
    """Follows some tasks of a job. All sets and keys are indices of tasks.

    left      those whose end is not reported yet
    active    the Task of each that is or was read
    agenda    a heap of times and indices: what is read when
    recorded  those that have recorded their own end, and whose output is sent
    over      the end that Slurm has confirmed, and since when that is known
    silent    since when Slurm says that they are over, and they have no own record
    gone      those that squeue shows no more
    pending   those that squeue shows as waiting
    requeued  those of them that have started, and wait to start again
    """

    def __init__(self, queue, ask, say, job, location):
        self.queue, self.say, self.job, self.location = queue, say, job, location
        self.run, self.key = locate(ask)
        self.fields, self.offsets = ask["fields"], {int(index): at for index, at in ask["offsets"].items()}
        self.tasks, self.followed, self.left = Tasks(self.run), set(ask["followed"]), set(ask["tasks"])
        self.active, self.agenda, self.recorded = {}, [], set()
        self.over, self.silent, self.gone, self.pending, self.requeued = {}, {}, set(), set(), set()
        now = self.begun = self.asked = self.news = self.filled = time.time()
        self.listed = self.reported_at = self.viewed = 0.0
        self.allowance, self.pause, self.took = READS_PER_SECOND / 10, 0, 0.0
        self.reported, self.troubles = None, set()
        for index in self.left & set(self.tasks.ends):  # only its output is missing
            self.over[index] = (self.tasks.ends[index], now)
        for index in () if self.tasks.array else self.left:  # its files are there before it starts
            self.schedule(index, now)

    def follow(self):
        self.queue.want(os.path.dirname(self.run))
        while self.location.current():
            self.location.wait()
            self.discover()
            more = self.read()
            self.look_at_queue()
            self.find_ends()
            self.finish()
            if not self.left:
                return self.answer()
            if not more:
                self.wait()
        return {}

    # Read

    def discover(self):
        """Find the tasks that have started, by a listing of their folder."""
        now = time.time()
        if now < self.listed or self.left <= set(self.active):
            return
        for index in (self.tasks.started() & self.left) - set(self.active):
            self.schedule(index, time.time() if self.listed else self.begun)
            self.news = now
        self.listed = now + max(pause_after(now - self.news), SHARE * (time.time() - now))

    def schedule(self, index, at):
        """Have a task read at a time, unless that is planned already; return it."""
        if index not in self.active:
            self.active[index] = Task(self.tasks, index, self.offsets.pop(index, {}), at)
        task = self.active[index]
        if task.due is None:
            task.due = at
            heapq.heappush(self.agenda, (at, index))
        return task

    def read(self):
        """Read the tasks that are due, as far as the allowance goes; return whether one has much more to send."""
        now, more = time.time(), False
        self.allowance = min(self.allowance + (now - self.filled) * READS_PER_SECOND, READS_PER_SECOND / 10)
        self.filled = now
        while self.agenda and self.agenda[0][0] <= now and self.allowance >= 1:
            index = heapq.heappop(self.agenda)[1]
            task = self.active.get(index)
            if not task:
                continue
            self.allowance -= 1
            task.due = None
            sent = task.read(partial(self.say, task=index))
            more |= sent == MOST_CHUNKS
            if not task.own:  # it runs, perhaps again
                self.recorded.discard(index)
            elif not sent or not task.short():
                self.recorded.add(index)
                if task.own["code"] is not None:  # one that was cut short may start again soon
                    continue
            self.schedule(index, now if sent == MOST_CHUNKS else now + pause_after(now - task.moved))
        return more

    def wait(self):
        """Sleep until something is due."""
        now = time.time()
        due = [now + 1, self.agenda[0][0] if self.agenda else now + 1]
        if not self.left <= set(self.active):
            due.append(self.listed)
        if self.all_recorded():
            due.append(self.asked + max(self.pause, self.took))
        time.sleep(max(min(due) - now, 0.01, len(self.left) * PAUSE_PER_TASK))

    # Ask Slurm

    def look_at_queue(self):
        """Report how many tasks wait and run; note those that squeue shows no more."""
        view, now = self.queue.view, time.time()
        self.complain(view["trouble"])
        if view["at"] != self.viewed:
            shown = self.queue.tasks(self.job, self.key)
            self.viewed, self.pending = view["at"], shown.get("PENDING", set())
            if self.viewed > self.begun + 5:  # an older view may be older than the job
                self.gone = self.left.difference(self.recorded, *shown.values())
        if self.tasks.array and now - self.reported_at < REPORT_EVERY:
            return
        started = {index for index, task in self.active.items() if task.began}
        early = (index for index in self.pending & started if self.active[index].heard == self.begun)
        if self.viewed < self.begun and next(early, None) is not None:  # it is not known whether these wait again
            return
        again = self.pending & started - set(self.over)  # if they had started before squeue showed them as waiting
        self.requeued = {index for index in again if self.active[index].heard < self.viewed}
        running = started - self.recorded - self.requeued - set(self.over)
        waiting = self.left - started - set(self.over)
        shown, reason, start, project = self.queue.row(self.job, self.key) or ("", "None", "", "")
        counts = {"waiting": len(waiting), "running": len(running), "requeued": len(self.requeued)}
        state = dict(counts, shown="" if shown in OVER else shown, reason=reason, start=start)
        if (state, project) != self.reported:
            self.reported, self.reported_at = (state, project), now
            self.say(state=dict(state, account=project))

    def all_recorded(self):
        if len(self.recorded) + len(self.over) < len(self.left):
            return False
        return self.left <= self.recorded | set(self.over) and not self.left <= self.requeued | set(self.over)

    def find_ends(self):
        """Ask Slurm which tasks are over: at once when all have recorded that, else seldom, and only if one may be."""
        since, open_ones = time.time() - self.asked, self.left - set(self.over)
        unseen = since > UNSEEN and time.time() - self.queue.view["at"] > UNSEEN
        if not unseen:
            open_ones -= self.requeued
        if not open_ones:
            return
        if self.all_recorded():
            if not self.pause:  # the last one has just recorded it: Slurm needs a moment to end the job
                self.asked, since, self.pause = time.time(), 0, 0.03
            due = since > max(self.pause, self.took)
            if due:  # the processes of a job that was cut short may have some seconds to end
                cut_short = any(self.active[index].own["code"] is None for index in open_ones)
                self.pause = min(max(1.5 * self.pause, int(cut_short)), SQUEUE_EVERY if cut_short else 5)
        else:
            self.pause = 0
            hint = self.silent or not open_ones.isdisjoint(self.recorded) or not open_ones.isdisjoint(self.gone)
            due = unseen or (hint and since > max(SQUEUE_EVERY, SHARE * self.took))
        if due:
            self.ask()

    def ask(self):
        begun = time.time()
        ends, certain, trouble = self.tasks.find_ends(self.job)
        self.asked = now = time.time()
        self.took = now - begun
        self.complain(trouble and "waiting for Slurm to confirm the end: %s" % trouble)
        doubtful = set(ends) & self.left - certain
        self.silent = {index: self.silent.get(index, now) for index in doubtful}
        certain |= {index for index in doubtful if now - self.silent[index] > LAG}
        if certain:
            self.tasks.keep({index: ends[index] for index in certain})
        for index in self.left & certain:
            self.over[index] = (ends[index], now)
            self.silent.pop(index, None)
        for index in self.recorded - set(self.over):  # it may have been put back in the queue
            if now - self.active[index].moved > SQUEUE_EVERY:
                self.schedule(index, now)

    def complain(self, text):
        """Report an error that may pass by itself, once; None: there is none. Several may come by turns."""
        if text and text not in self.troubles:
            self.troubles.add(text)
            self.say(trouble=text)

    # Report ends

    def finish(self):
        """Report the ends of the tasks that are over and whose output is sent."""
        now = time.time()
        for index in list(self.over):
            end, since = self.over[index]
            task = self.active.get(index) or self.schedule(index, now)
            # It was read after it recorded its success, or else after Slurm confirmed its end: Slurm writes to stderr.
            success = end["state"] == "COMPLETED" and end.get("code") is not None
            read = success and task.own and task.own["time"] == end["time"]
            short = task.short() if read or task.empty > since else None
            if short is None or (short and now - max(since, task.moved) < COMMAND_PATIENCE):
                self.schedule(index, now + pause_after(now - since))
                continue
            lost = {each.name: each.at for each in task.streams if each.removed and each.name != MESSAGES}
            self.say(task=index, end=end, short={**short, **lost})
            del self.over[index], self.active[index]
            for known in (self.left, self.recorded, self.gone):
                known.discard(index)

    def answer(self):
        """Return what sacct says of all followed tasks, by index."""
        times = [self.tasks.ends[index]["times"] for index in self.followed if index in self.tasks.ends]
        starts, ends = [each[1] for each in times if each[1]], [each[2] for each in times if each[2]]
        ran, rows = max(ends) - min(starts) if starts and ends else 0, {}
        for row in account(self.job, self.fields, ran, self.followed):
            found = indices_in(row[0])
            if len(found) == 1:  # tasks that never started share a row, with nothing in it
                rows.setdefault(found.pop(), []).append(row)
        return {"over": True, "rows": rows}
